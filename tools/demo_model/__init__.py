"""Parts of `tools/train_demo_model.py`: each module is one stage of making the embedded model."""
