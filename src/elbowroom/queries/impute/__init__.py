"""What may stand in a missing cell?"""
