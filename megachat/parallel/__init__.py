"""The mesh of processes, its collectives, and the engine. Never imports the model."""
