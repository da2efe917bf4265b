"""Networks of ONNX files, as modules of PyTorch.

:mod:`.file` reads and checks, :mod:`.translation` is what rules stand on; the rules are in
:mod:`.arithmetic`, :mod:`.layers`, :mod:`.resizing` and :mod:`.shapes`.
"""

from .loading import load_onnx

__all__ = ["load_onnx"]
