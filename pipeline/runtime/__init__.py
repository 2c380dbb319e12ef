"""What every stage stands on: the project's folder and files, its process, MLflow's store, progress."""
