"""Generated C++: sources, the compiler, the dispatcher of kernels."""
