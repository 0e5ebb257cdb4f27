from .read import read_work_directory as read_work_directory
from .workdir import checkpoint_steps as checkpoint_steps
