"""What evaluation needs of models, tables and workers; the folder above knows arrays only."""
