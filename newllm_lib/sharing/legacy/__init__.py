"""Import of the experiment series' own `.pt` files: weights, histories and what is known of the recipe, safely."""

from newllm_lib.sharing.legacy.import_run import import_run
from newllm_lib.sharing.legacy.old_checkpoint import OldFile, import_checkpoint, read_old

__all__ = ["OldFile", "import_checkpoint", "import_run", "read_old"]
