"""Searches before a reference runs: modes, best normals, tempered chains."""
