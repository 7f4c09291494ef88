"""TensorRT, simulated on top of its real bindings.

Enums, flags and the classes that users derive from (logger, progress monitor, profiler, calibrators) are the real ones.
The classes with native parts are played here: a plan is the segment's ONNX with its shapes fixed, and running it means
ONNX Runtime on the CPU. Every attribute and every call of a played class is held to the real class of the same name,
so code that runs here uses nothing that this version of TensorRT lacks.
"""

import simulation
from tensorrt_bindings import *
from tensorrt_bindings import __version__

from tensorrt.building import Builder, OnnxParser
from tensorrt.running import Runtime

if simulation.plays("no-library"):
    raise ImportError("libnvinfer.so: cannot open shared object file: No such file or directory")
