"""Time the linear calls and the whole step of FLUX.1-dev with every alternative that is installed.

`flux-kernels bench` is the command; `python -m bench.run` and `bench.gpu_session` are the same from a checkout, where torch and
triton are enough. Nothing here but `plots` needs more than that to be imported.
"""
