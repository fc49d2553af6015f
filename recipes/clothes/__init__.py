"""SISMA on street photographs of people (Clothing Co-Parsing): what differs from `recipes.sisma`."""
