from .errors import UserError as UserError
from .language_model import LanguageModel as LanguageModel
from .language_model import load as load

__version__: str
