"""Pages and cards about runs, for people: gathered from MLflow, written as one file each."""
