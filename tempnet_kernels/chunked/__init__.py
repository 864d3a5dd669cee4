"""What the native and the Triton kernels share: loops over tiles, chunks of rows and parts of a
vocabulary, with the platform's matrix products between kernels of either backend."""
