"""A stand-in for PyCUDA 2026.1: the names that cada_deploy.device.pycuda uses, recorded from it."""
