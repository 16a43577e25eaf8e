package components

// unsupported lists, by message of the schema, the keys of the manifest's language that this version does not carry out. They are
// refused at their place: a key is never taken and then not heeded. A version that carries a key out puts it into components.proto and
// takes it from here.
var unsupported = map[string]map[string]string{
	"Manifest": {
		"domain":       "an application answers at the gateway under /app/ and by the cluster's domain",
		"priority":     "all applications have the same",
		"price":        "write it for a component",
		"anchors":      "write them for a component",
		"max_diameter": "write it for a component",
		"update":       "a swap replaces an instance at once and returns to the old version when the new one is not healthy",
		"secrets":      "pass a file readable by the component, or an attribute",
	},
	"ComponentSpec": {
		"secrets":    "pass a file readable by the component, or an attribute",
		"update":     "a swap replaces an instance at once and returns to the old version when the new one is not healthy",
		"scale":      "set count and deploy again",
		"bind_query": "name the component under bindings",
		"domain":     "an application answers at the gateway under /app/ and by the cluster's domain",
		"priority":   "all components have the same",
		"budget":     "write it for the whole application",
		"cost":       "write it for the whole application",
		"content":    "name the components side by side",
	},
}

// notYet is the same for keys that are in the schema: they are parsed and checked, and nobody heeds them yet. When something does, its
// line goes.
var notYet = map[string]map[string]string{
	"ComponentSpec": {
		"restart": "the node chooses when a component that ended is started again",
	},
	"Sandbox": {"network": "all components have the same"},
}

// stopSignals are the signals run.stop may name.
var stopSignals = []string{"SIGTERM", "SIGINT", "SIGQUIT", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGKILL"}
