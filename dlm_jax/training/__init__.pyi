from .run import Outcome as Outcome
from .run import train as train
from .step import TrainState as TrainState
from .step import init_state as init_state
from .step import make_step as make_step
