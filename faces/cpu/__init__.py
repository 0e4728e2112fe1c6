"""Faster training and inference on x86 CPUs in float32.

Convolutions of stride 1 use Winograd's algorithm. A small C kernel, compiled on first use if a C compiler is available,
computes its transforms and the gradients of PReLU. A training step takes 0.4 to 0.65 times as long as in plain PyTorch,
and an evaluation on LFW takes about a quarter of the time of the usual script; docs/benchmarks.md has the measurements
for each machine. Results differ from those of PyTorch's layers by rounding only.

This package is never used on a GPU, in bfloat16, or on processors other than x86, where it has not been measured. Set
the environment variable FACES_CPU_KERNELS=0 to turn it off: to compare with plain PyTorch, to debug, or to avoid
running a compiler. Nothing else in the project depends on it; without it, everything works, only slower.
"""
