"""How the ops are fast. Modules here bear the ops' names and are imported only when routing has chosen them."""
