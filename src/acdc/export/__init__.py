"""Take a trained network elsewhere: one plain safetensors file, or ONNX."""

from acdc.export.onnx_file import to_onnx
from acdc.export.safetensors_file import to_safetensors

__all__ = ["to_onnx", "to_safetensors"]
