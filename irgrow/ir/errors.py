"""Every error a caller can cause. Each says who, what was found, what was expected, and what to do."""

from __future__ import annotations


class IrgrowError(Exception):
    """The family: `except IrgrowError` catches every mistake that irgrow reports to its caller."""

    def __init__(self, who: str, found: object = None, expected: object = None, do: str | None = None) -> None:
        self.who, self.found, self.expected, self.do = who, found, expected, do
        text = who
        if found is not None:
            text += f": found {found}"
        if expected is not None:
            text += f", expected {expected}" if found is not None else f": expected {expected}"
        if do is not None:
            text += f"; {do}"
        super().__init__(text)

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.who, self.found, self.expected, self.do)


class InvalidNetwork(IrgrowError):
    """A network breaks an invariant; the subclass says which one."""


class BadName(InvalidNetwork):
    """A group or bundle name that is empty, repeated, not an identifier, or unknown where it is used."""


class BadShape(InvalidNetwork):
    """Shapes of groups, patterns and tensors that do not fit together."""


class BadProperty(InvalidNetwork):
    """An activation, aggregation, normalisation or role that does not exist or does not fit."""


class CyclicNetwork(InvalidNetwork):
    """A neuron that feeds itself, directly or through others."""


class DanglingEdge(InvalidNetwork):
    """An edge that begins or ends at a neuron that does not exist."""


class DuplicateEdge(InvalidNetwork):
    """Two edges of one bundle between the same two neurons."""


class WeightSize(InvalidNetwork):
    """A tensor whose number of entries, dtype or device does not fit its owner."""


class NonFinite(InvalidNetwork):
    """A NaN or infinity among the tensors of a network."""


class Unreachable(InvalidNetwork):
    """An output that no input reaches."""


class BadSerial(InvalidNetwork):
    """Unit serials that are missing, repeated or not below the network's next serial."""


class UnknownName(IrgrowError):
    """A name (group, bundle, unit, site, method, option) that does not exist."""


class Refused(IrgrowError):
    """A pass that cannot be applied here; names the pass, the place and the reason."""


class PromiseBroken(IrgrowError):
    """A morphism that does not keep what its pass promised."""


class StaleMorphism(IrgrowError):
    """A morphism, proposal or statistics made for another structure than the one it is used on."""


class BadData(IrgrowError):
    """Data, gradients or statistics of the wrong shape or dtype, or with NaN or infinity in them."""


class Diverged(IrgrowError):
    """A training loss that became NaN or infinite; names the epoch."""


class GrowthFailed(IrgrowError):
    """A growth that could not be applied to the model; the model and the optimizer are unchanged."""


class BadFile(IrgrowError):
    """A file that is damaged, incomplete or not ours; nothing was loaded from it."""


class BackendError(IrgrowError):
    """A backend that was asked for by name and cannot run here."""
