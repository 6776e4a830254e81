"""What DINOv2's signal is made of: heads, targets, losses, masks, crops, schedules."""
