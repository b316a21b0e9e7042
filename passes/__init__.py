"""Rewrites: each pass turns one Network into the next and says what it keeps."""

if __name__ != "irgrow.passes":
    raise ImportError(
        f"this package was imported as {__name__!r}; import it as 'irgrow.passes' "
        "(a second copy would hold a second registry)"
    )
