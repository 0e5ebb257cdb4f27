from .noise import NoisyBatch as NoisyBatch
from .noise import add_noise as add_noise
from .recipe import Recipe as Recipe
from .recipe import recipe_at as recipe_at
from .recipes import RECIPES as RECIPES
