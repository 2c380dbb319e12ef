"""The code of a logged model: MLflow copies this file beside the deltas and runs it to load them ("from code").

It holds no more than needed to reach the installed package, which a serving host must have.
"""

from mlflow.models import set_model

from pipeline.serving.served import Served

set_model(Served())
