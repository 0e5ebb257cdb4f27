from .log_likelihood import Likelihood as Likelihood
from .log_likelihood import denoising_recipe as denoising_recipe
from .log_likelihood import likelihood as likelihood
