"""The test part behind a seal: no labels, no images, until every choice of an evaluation is made."""

from collections.abc import Callable

import torch
from torch import Tensor

from ddengine.errors import DDError
from ddengine.types import DataSpec, Images


class Sealed:
    """Images that raise DDError for whoever reads them before `unseal` was called, in any process.

    How many there are and what they mean may be known. The seal is one shared byte, so that processes which
    were started under it see when it is broken.
    """

    def __init__(self, images: Images) -> None:
        self._images = images
        self._open = torch.zeros((), dtype=torch.uint8)

    def __len__(self) -> int:
        return len(self._images)

    @property
    def spec(self) -> DataSpec:
        """What the images mean."""
        return self._images.spec

    @property
    def images(self) -> Images:
        """The images with their labels (DDError under the seal)."""
        if not self._open:
            raise DDError(
                "the test part was read before the evaluation had made all its choices",
                "Choose rates, epochs and sets on the validation part",
            )
        return self._images

    def unseal(self) -> None:
        """Break the seal: all choices are made."""
        self._open.fill_(1)

    def hashed(self, content: Callable[[Images], str]) -> str:
        """What `content` makes of the images: a hash of them, which tells nothing about any label."""
        return content(self._images)

    def tensors(self) -> list[Tensor]:
        """What must lie in shared memory for other processes: the seal, and bytes that nobody interprets."""
        return [self._open, self._images.x, self._images.y]
