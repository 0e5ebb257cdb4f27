from .loss import LossSums as LossSums
from .loss import loss_sums as loss_sums
