from .mesh import make_mesh as make_mesh
