"""What asks for an accelerator, in stages that are short enough for a machine lent by the minute."""
