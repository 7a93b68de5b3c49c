"""A ROS 2 node that captions the pictures of a topic."""
