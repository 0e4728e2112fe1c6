"""Faster training and inference on x86 CPUs in float32, and nothing else.

Convolutions of stride 1 are computed by Winograd's method, and a small C kernel, compiled on first use if there is a C
compiler, does its transforms and the gradient of PReLU. A training step takes 0.4 to 0.65 of the time of plain PyTorch, and
an evaluation on LFW about a quarter of that of the usual script; docs/benchmarks.md has the figures with their machines.
Results differ from PyTorch's layers by rounding only.

It is never used on a GPU, in bfloat16, or on processors other than x86, where it was not measured. Set the environment
variable FACES_CPU_KERNELS=0 to switch it off: to compare with plain PyTorch, to debug, or if a compiler is not to be run.
No other part of the project depends on it; without it everything runs, only slower.
"""
