"""Faster training and inference on x86 CPUs in float32.

Convolutions of stride 1 use Winograd's algorithm. A small C kernel, which is compiled on first use, computes its
transforms and the gradients of PReLU. docs/benchmarks.md says how much faster that is. Results differ from PyTorch's
layers by rounding only.

This package is never used without a C compiler, on a GPU, in bfloat16, or on processors other than x86, where it has
not been measured. Set the environment variable FACES_CPU_KERNELS=0 to turn it off: to compare with plain PyTorch, to
debug, or to avoid running a compiler. Without it, everything works, only slower.
"""
