"""Models of Hugging Face's formats: what of ours they can express, and how it is written."""

from moetrain.hf.exporting import export
from moetrain.hf.formats import FORMATS, FormatName

__all__ = ["FORMATS", "FormatName", "export"]
