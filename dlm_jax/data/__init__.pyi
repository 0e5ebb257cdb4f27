from .dataset import Dataset as Dataset
from .mixture import Mixture as Mixture
from .prepare import prepare as prepare
from .text import read_documents as read_documents
from .tokenizer import Tokenizer as Tokenizer
