"""The command measure: what each type of each tensor costs, on states of real pictures."""
