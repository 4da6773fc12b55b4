"""`dots compare`: measure side by side what each method needs to match plain GRPO."""
