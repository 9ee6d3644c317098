"""The kernel matrix: boots Debian's stock kernels in QEMU and runs the tests of `tests/kernel` there. `make test-kernels` starts it.

matrix.py says which kernels and which tests; debian.py fetches kernels; disks.py makes what a guest reads; machine.py boots it;
results.py reads what it answers. Nothing is installed on the host, no guest has a network.
"""
