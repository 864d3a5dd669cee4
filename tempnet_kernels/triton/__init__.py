"""The operators in Triton, for CUDA tensors; for CPU tensors in its interpreter
(TRITON_INTERPRET=1)."""
