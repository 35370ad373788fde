"""torchrun with one difference: where a rank ended the job with a message, no launcher traceback follows it.

python -m tropd_mcore.train.launch <torchrun arguments>
"""

import sys

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun


def main(arguments: list[str]) -> int:
    """Run torchrun; returns 0, or the exit code of the first rank that failed (1 where a signal ended it)."""
    try:
        torchrun(arguments)
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        return failure.exitcode if failure.exitcode > 0 else 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
