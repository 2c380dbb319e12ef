"""A delta as MLflow serves it: a request's rows in, the Predictor's answers out, and 400 for what is no request.

MLflow reads and checks a request by the model's signature before it calls ``Served.predict``; what it lets through
(a number among texts, a text of megabytes) is checked here.
"""

from pathlib import Path
from typing import Any

from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.pyfunc.model import PythonModel, PythonModelContext

from pipeline.runtime.cpu import set_up_cpu

set_up_cpu()  # torch is not imported yet: what it computes is what `fishmask predict` does

import pandas as pd  # noqa: E402
import pyarrow as pa  # noqa: E402

from pipeline.errors import DataError, FishmaskError  # noqa: E402
from pipeline.serving.logged import DELTAS  # noqa: E402
from pipeline.serving.predictor import Predictor  # noqa: E402
from pipeline.serving.questions import IMAGE  # noqa: E402
from pipeline.tasks.custom import CLASS, FILE  # noqa: E402
from pipeline.tasks.raw import RawSplit  # noqa: E402


class Served(PythonModel):
    """One base, loaded and verified at the start, and the deltas over it."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load base and deltas as the model's configuration names them.

        ``base`` may be replaced where the host has it elsewhere (``model_config={"base": ...}`` of
        ``mlflow.pyfunc.load_model``, or ``SERVING_MODEL_CONFIG`` of ``mlflow models serve``): its digest decides.

        Args:
            context: of MLflow.
        """
        config = dict(context.model_config)
        folder = Path(context.artifacts[DELTAS])
        self._names = list(config[DELTAS])
        self._rows, self._characters = int(config["max_rows"]), int(config["max_characters"])
        self._predictor = Predictor(
            {name: folder / name for name in self._names},
            config["base"],
            text=config["text"],
            max_length=config["max_length"],
            device=config["device"],
            precision=config["precision"],
            batch_size=int(config["batch_size"]),
            max_new_tokens=config["max_new_tokens"],
        )
        asked = [self._predictor.use(name).asked for name in self._names]
        self._images = any(one.interface.image is not None for one in asked)

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """Answer a request.

        Args:
            context: of MLflow.
            model_input: the rows.
            params: ``delta``, the one to ask. [the first]

        Returns:
            The answers, a row each.

        Raises:
            MlflowException: for rows or params that make no sense; the server answers 400.
        """
        try:
            rows = RawSplit(self._table(model_input), "the request")
            answers = self._predictor.answer(rows, by=(params or {}).get("delta", self._names[0]))
        except FishmaskError as error:
            raise MlflowException(str(error), error_code=INVALID_PARAMETER_VALUE) from None
        return frame(answers.columns)

    def _table(self, given: pd.DataFrame) -> pa.Table:
        """The columns that are read: texts, encoded images, or nulls. A file's path is never one of them."""
        if len(given) > self._rows:
            raise DataError(f"the request has {len(given):,} rows; expected at most {self._rows:,}")
        columns = {}
        for name in given.columns:
            if name in (FILE, CLASS) and self._images:
                continue  # the columns of images by path, which a request may not name
            kind = bytes if name == IMAGE and self._images else str
            values = [None if _is_null(value) else value for value in given[name].tolist()]
            for row, value in enumerate(values):
                where = f"the request: column '{name}', row {row}"
                if value is None:
                    continue
                if not isinstance(value, kind):
                    raise DataError(
                        f"{where} is {type(value).__name__}; expected {'text' if kind is str else 'an image'}"
                    )
                if isinstance(value, str) and len(value) > self._characters:
                    raise DataError(
                        f"{where} has {len(value):,} characters; expected at most {self._characters:,}"
                    )
                if isinstance(value, str) and not _encodable(value):
                    raise DataError(f"{where} is no Unicode text")
            columns[str(name)] = pa.array(values, pa.string() if kind is str else pa.binary())
        return pa.table(columns)


def frame(columns: dict[str, pa.Array]) -> pd.DataFrame:
    """Turn answers into what MLflow writes as JSON, where null is null and not NaN.

    Returns:
        Columns of Python values.
    """
    return pd.DataFrame({name: pd.Series(values.to_pylist(), dtype=object) for name, values in columns.items()})


def _is_null(value: Any) -> bool:
    return value is None or value is pd.NA or (isinstance(value, float) and value != value)


def _encodable(text: str) -> bool:
    """Tell whether a text has UTF-8: JSON's escapes can name half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
