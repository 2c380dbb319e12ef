"""One file per DVC stage: read its params, call pipeline, write its outs."""
