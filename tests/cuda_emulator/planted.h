// Faults planted on purpose: the emulator has to stop at every one of them.
#pragma once

#include <string>
#include <vector>

std::vector<std::string> planted_names();

// Runs one; returns true when it came to its end undetected.
bool run_planted(const std::string& name);
