"""Tensors in, tensors out: the numeric kernels. Nothing here knows what a network is."""

if __name__ != "irgrow.kernels":
    raise ImportError(
        f"this package was imported as {__name__!r}; import it as 'irgrow.kernels' "
        "(a second copy would hold a second set of compiled kernels)"
    )
