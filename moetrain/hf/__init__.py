"""Models of Hugging Face's formats: what of ours they can express, and both ways."""

from moetrain.hf.exporting import export
from moetrain.hf.formats import FORMATS, FormatName
from moetrain.hf.importing import import_model

__all__ = ["FORMATS", "FormatName", "export", "import_model"]
