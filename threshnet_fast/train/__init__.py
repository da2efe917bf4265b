"""Training: recipes, the loop, its checkpoints, and the files a trained model is kept in."""

from ..models.create import load_model
from ..models.weights_file import ModelInfo, load_state, read_info, save_model

__all__ = ["ModelInfo", "load_model", "load_state", "read_info", "save_model"]
