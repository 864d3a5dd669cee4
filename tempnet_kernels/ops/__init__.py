"""An operator a file: the public function, then its gradient and its schema."""

from tempnet_kernels.core import register

register.load_native()
