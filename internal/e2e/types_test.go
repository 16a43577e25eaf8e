package e2e

import (
	"strings"
	"testing"
)

const shopTiers = `application: shop
components:
  - name: store
    artifact: shop@1.0.0
  - name: web
    artifact: shopweb@1.0.0
    bindings: {store: shop/store}
`

// What is bound has to fit: a deploy, a bind and a swap that would leave an interface with a provider that has not got it are refused, with what is required and
// what is there, and nothing is changed. A swap that takes away what nobody is bound to needs --force.
func TestInterfacesAreChecked(t *testing.T) {
	t.Parallel() // it waits most of the time
	g := plant(t, 1)
	n1 := g.Nodes[0]
	g.push(n1, component(t, "shop", "1.0.0"), component(t, "shopweb", "1.0.0"), component(t, "counter", "1.0.0"), component(t, "kv", "1.0.0"))
	file := func(edit ...string) string {
		return g.file("shop.yaml", strings.NewReplacer(edit...).Replace(shopTiers))
	}

	g.refused(n1, []string{"interface store of shop/web is bound to shop/store (counter@1.0.0)", "shop.v1.Store is required", "counter.v1.Counter"}, "deploy", file("shop@1.0.0", "counter@1.0.0"))
	g.refused(n1, []string{"bindings.warehouse of shop/web", "requires no interface of this name; it requires store"}, "deploy", file("{store:", "{warehouse:"))
	if out := g.do(n1, "apps"); strings.Contains(out, "shop") {
		t.Errorf("a deploy that was refused has left something:\n%s", out)
	}

	g.deploy(n1, shopTiers)
	g.running(n1, "shop/web-0", nil)
	g.deploy(n1, "application: tally\ncomponents: [{name: counter, artifact: counter@1.0.0}]\n")
	g.running(n1, "tally/counter-0", nil)
	g.refused(n1, []string{"tally/counter (counter@1.0.0) does not fit", "shop.v1.Store is required"}, "bind", "shop/web", "store", "tally/counter")
	// Later versions that are something else altogether.
	g.do(n1, "registry", "push", component(t, "kv", "7.0.0"), "--name", "counter")
	g.do(n1, "registry", "push", component(t, "kv", "7.1.0"), "--name", "shop")
	g.refused(n1, []string{"counter@7.0.0 cannot take the place of 1.0.0", "interface counter (counter.v1.Counter) is gone"}, "swap", "tally/counter@7.0.0")
	g.refused(n1, []string{"interface store of shop/web is bound to shop/store (shop@7.1.0)"}, "swap", "--force", "shop/store@7.1.0")
	g.running(n1, "shop/web-0", nil)
	g.running(n1, "shop/store-0", nil)

	plan := g.do(n1, "plan", g.file("tally.yaml", "application: tally\ncomponents: [{name: counter, artifact: counter@7.0.0}]\n"))
	if !strings.Contains(plan, "callers of 1.0.0 will miss") || !strings.Contains(plan, "interface counter (counter.v1.Counter) is gone") {
		t.Errorf("the plan does not say what callers will miss:\n%s", plan)
	}
}
