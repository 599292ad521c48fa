"""What is learnt of a posterior before a reference runs: modes, best normals, tempered chains."""
