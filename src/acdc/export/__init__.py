"""Take a trained network elsewhere: one plain safetensors file, ONNX, or the file of a runtime."""

from acdc.export.onnx_file import to_onnx
from acdc.export.runtime_file import to_runtime
from acdc.export.safetensors_file import to_safetensors

__all__ = ["to_onnx", "to_runtime", "to_safetensors"]
