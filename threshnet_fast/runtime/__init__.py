"""What runs models: in place of their own forward pass, frozen, in training; and says how."""
