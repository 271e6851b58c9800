"""Drawing pictures: tasks, sizes, memory, placement, the pipeline, and the embedded model."""
