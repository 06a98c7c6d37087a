"""Work in batches that fit into memory."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from tqdm import tqdm


@dataclass
class Batches:
    """Work in batches that fit: `most` items at once, halved for good when memory runs out."""

    most: int

    def run(self, items: list, work, bad_item: tuple = ()) -> Iterator[tuple[list, object]]:
        """(batch, work(batch)) for consecutive batches of `items`.

        A batch that does not fit, or raises one of the errors `bad_item`, is halved until it passes
        or is a single item, which comes with its error instead of a result.
        """
        done, size, most = 0, self.most, self.most
        while done < len(items):
            batch = items[done : done + size]
            try:
                result = work(batch)
            except (RuntimeError, *bad_item) as error:
                # A CPU's is no error of its own.
                memory = isinstance(error, torch.OutOfMemoryError) or "allocate" in str(error)
                if isinstance(error, RuntimeError) and not memory:
                    raise
                if len(batch) > 1:
                    size = len(batch) // 2
                    if memory:
                        self.most = size
                        tqdm.write(f"out of memory with {len(batch)} at once, going on with {size}")
                    continue
                result = error
                self.most = most  # this item's fault, not the batch's
            yield batch, result
            done += len(batch)
            size = min(self.most, 2 * size)
